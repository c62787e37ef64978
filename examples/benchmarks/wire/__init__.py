"""Training over links of limited rate, beside a model of the network."""
