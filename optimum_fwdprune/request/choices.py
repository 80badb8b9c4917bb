"""The words that options of a request may be set to, for the code that decides by them."""

# Of `scope`: the loss of whole pruned models decides what each site loses.
SEARCH = "search"
