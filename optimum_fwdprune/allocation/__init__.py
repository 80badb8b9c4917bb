"""Plans and budgets as pure functions: how many units each site loses, and which of them are kept."""
