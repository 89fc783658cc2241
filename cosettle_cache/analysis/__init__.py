"""What tokens and heads are worth: consistency against separability, probes, export, PCA."""
