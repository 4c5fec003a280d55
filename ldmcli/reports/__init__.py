"""What people look at: cost estimates, reports, model cards, data reports, the demo."""
