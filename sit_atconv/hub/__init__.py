"""The Hugging Face hub: what goes up to it, and what comes down."""
