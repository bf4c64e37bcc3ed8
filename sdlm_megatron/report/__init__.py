"""HTML reports: the page kit, figures, and the page about a training run."""
