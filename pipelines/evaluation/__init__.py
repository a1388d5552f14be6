"""The parts of `reelway evaluate`: the sweep, the workers, the tables, the report and its page."""
