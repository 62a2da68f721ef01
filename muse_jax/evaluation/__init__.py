"""What a picture shows and how well it was reconstructed, measured."""
