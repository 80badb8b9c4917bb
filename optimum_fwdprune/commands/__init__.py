"""The commands of `optimum-cli fwdprune`."""
