"""What was measured -> pages and pictures."""
