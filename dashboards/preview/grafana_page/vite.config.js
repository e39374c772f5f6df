// Grafana's packages read variables that only Node has.
export default {
  esbuild: { jsx: 'automatic' },
  define: { 'process.env.NODE_ENV': '"production"', 'process.env': '{}', global: 'window' },
  build: { minify: false, target: 'esnext', chunkSizeWarningLimit: 20000 },
};
