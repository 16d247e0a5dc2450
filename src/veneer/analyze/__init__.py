"""What an adapter learned: spectra of updates, and how two adapters overlap or conflict."""
