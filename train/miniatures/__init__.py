"""The papers' headline results in small: trained and checked in minutes on one core."""
