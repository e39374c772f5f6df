"""The client for pages: `agx.js` with its types, and a React hook; `agx.web` serves them."""
