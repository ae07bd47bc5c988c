"""The page's tabs: inputs, outputs and what calls what. What is computed is next door."""
