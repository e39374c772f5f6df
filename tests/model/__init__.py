"""Models of protocols, explored in every order of their steps."""
