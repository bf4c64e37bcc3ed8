"""HTML reports: the page kit, figures, and the page of a training run."""
