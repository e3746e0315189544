"""What a job's script asks for around the ranks: attempts, preflight, launch, submission."""
