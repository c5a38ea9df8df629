"""Comparing methods: trials, statistics, and the page that shows them."""
