"""Which method for this model and these rows: measure, propose by rules, race, recommend."""
