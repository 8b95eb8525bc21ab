"""Goku's operators put into the models of other libraries; nothing is imported here."""
