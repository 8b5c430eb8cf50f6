"""Methods that need data or gradients: drivers that call the user's models, one method a file."""
