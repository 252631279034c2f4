"""How the zeros of one weight are held."""
