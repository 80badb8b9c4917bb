"""Plans and budgets as pure functions: how much each site loses, and which units stay."""
