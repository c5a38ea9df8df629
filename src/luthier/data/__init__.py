"""Sources, layouts, validation of every row, rendering to token ids and spans, and the prepared data."""
