// Prints JSON schemas made from Grafana's own types: of a board, and of each panel's options and field configuration.
import { createGenerator } from "ts-json-schema-generator";

const raw = "node_modules/@grafana/schema/dist/esm/raw";
const cfg = (kind, name) => `${raw}/composable/${kind}/panelcfg/x/${name}PanelCfg_types.gen.d.ts`;
const wanted = {
  board: [`${raw}/dashboard/x/dashboard_types.gen.d.ts`, "Dashboard"],
  panel: [`${raw}/dashboard/x/dashboard_types.gen.d.ts`, "Panel"],
  "stat options": [cfg("stat", "Stat"), "Options"],
  "bargauge options": [cfg("bargauge", "BarGauge"), "Options"],
  "heatmap options": [cfg("heatmap", "Heatmap"), "Options"],
  "heatmap field": [cfg("heatmap", "Heatmap"), "FieldConfig"],
  "table options": [cfg("table", "Table"), "Options"],
  "table field": [cfg("table", "Table"), "FieldConfig"],
  "timeseries options": [cfg("timeseries", "TimeSeries"), "Options"],
  "timeseries field": [cfg("timeseries", "TimeSeries"), "FieldConfig"],
};

const schemas = {};
for (const [name, [path, type]] of Object.entries(wanted)) {
  schemas[name] = createGenerator({ path, type, skipTypeCheck: true, additionalProperties: false }).createSchema(type);
}
console.log(JSON.stringify(schemas));
