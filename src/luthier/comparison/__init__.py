"""Methods side by side on one's own model and data: entries, trials, statistics, the table and the page."""
