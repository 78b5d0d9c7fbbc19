"""What `medusa_model.MedusaModel` is made of: the backbone, the heads, their loss, their file."""
