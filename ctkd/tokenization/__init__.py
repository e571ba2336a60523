"""What two tokenizers have in common."""
