"""Rule-based rewards: graders and reward terms."""
