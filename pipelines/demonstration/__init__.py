"""The stages of `reelway demo`, the machine that runs them, and the page that shows what they made."""
