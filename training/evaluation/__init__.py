"""Everything on the test split: profiles, their rivals, controls, and how sure that is."""
