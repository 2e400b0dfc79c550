"""What a checkpoint holds of a compressed training: saved, sealed, verified and resumed."""
