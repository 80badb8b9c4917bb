"""`optimum-cli fwdprune ...`"""
