"""Everything on the test split: profiles, their rivals, controls, and statistical significance."""
