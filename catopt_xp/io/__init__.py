"""What is written, read and said, safely: whole files, archives of any origin, lines for a terminal."""
