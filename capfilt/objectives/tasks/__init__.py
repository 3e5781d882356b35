"""What a family is pretrained with: one file a family."""
