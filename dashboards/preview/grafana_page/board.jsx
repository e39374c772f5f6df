// One board, drawn with Grafana's own components from /data.json: {boards, panels: the answers by panel, from, to}.
import { FieldType, ThemeContext, createDataFrame, createTheme, getDisplayProcessor } from '@grafana/data';
import { BarGauge, BigValue, GlobalStyles, PanelChrome, Table, TimeSeries } from '@grafana/ui';
import { createRoot } from 'react-dom/client';

const WIDTH = 1500, ROW = 36, GAP = 8; // pixels; a row of Grafana's grid has 30 and the gap
const theme = createTheme({ colors: { mode: 'dark' } });

// A field with the panel's defaults, and what the panel changes for this name.
function field(panel, name, type, values, index = 0) {
  const config = structuredClone(panel.fieldConfig.defaults);
  config.custom ??= {};
  config.displayName = name;
  for (const override of panel.fieldConfig.overrides.filter((each) => each.matcher.options === name))
    for (const { id, value } of override.properties)
      if (id.startsWith('custom.')) config.custom[id.slice(7)] = value;
      else config[id] = value;
  const made = { name, type, values, config, state: { seriesIndex: index } };
  made.display = getDisplayProcessor({ field: made, theme });
  return made;
}

function Lines({ panel, answers, width, height, range }) {
  const times = [...new Set(answers.flatMap((line) => line.at))].sort((a, b) => a - b);
  const fields = answers.map((line, index) => {
    const known = new Map(line.at.map((at, place) => [at, line.values[place]]));
    return field(panel, line.name, FieldType.number, times.map((at) => known.get(at) ?? null), index);
  });
  const frame = { fields: [{ name: 'time', type: FieldType.time, values: times, config: {} }, ...fields], length: times.length };
  return (
    <TimeSeries frames={[frame]} structureRev={1} width={width} height={height} timeZone="utc" timeRange={range}
      legend={panel.options.legend} options={panel.options} tweakAxis={(axis) => axis} tweakScale={(scale) => scale} />
  );
}

function BigNumber({ panel, answers, width, height }) {
  const shown = field(panel, '', FieldType.number, []).display(answers[0]?.values.filter((v) => v !== null).at(-1));
  const { colorMode, justifyMode } = panel.options;
  return <BigValue {...{ width, height, theme, colorMode, justifyMode }} value={shown} graphMode="none" textMode="auto" />;
}

function Bars({ panel, answers, width, height }) {
  const longest = answers.reduce((most, line) => (line.name.length > most.length ? line.name : most), '');
  return answers.slice(0, Math.floor(height / 34)).map((line) => {
    const { config, display } = field(panel, line.name, FieldType.number, line.values);
    config.min = 0;
    config.max = Math.max(...answers.map((each) => each.values.at(-1))) || 1;
    const value = { ...display(line.values.at(-1)), title: line.name };
    return (
      <div key={line.name} style={{ marginBottom: 6 }}>
        <BarGauge {...{ width, theme, value, display }} height={28} field={config} orientation="horizontal" showUnfilled
          displayMode={panel.options.displayMode} valueDisplayMode={panel.options.valueMode} itemSpacing={8}
          lcdCellWidth={12} alignmentFactors={{ title: longest, text: '$0000.00' }} />
      </div>
    );
  });
}

function Rows({ panel, answers, width, height }) {
  const { renameByName, indexByName } = panel.transformations.at(-1).options;
  const names = Object.keys(renameByName).sort((a, b) => indexByName[a] - indexByName[b]);
  const fields = names.map((name) => {
    const type = name.startsWith('Value #') ? FieldType.number : FieldType.string;
    return field(panel, renameByName[name], type, answers.map((row) => row[name] ?? null));
  });
  return <Table data={createDataFrame({ fields })} width={width} height={height} />;
}

const KINDS = { timeseries: Lines, stat: BigNumber, bargauge: Bars, table: Rows };

function Panel({ panel, answers, range }) {
  const Kind = KINDS[panel.type]; // the components have no heatmap
  const { w, h } = panel.gridPos;
  return (
    <PanelChrome title={panel.title} width={(w * WIDTH) / 24 - GAP} height={h * ROW - GAP} padding="md">
      {(width, height) => (Kind ? <Kind {...{ panel, answers, width, height, range }} /> : <p>{panel.type}</p>)}
    </PanelChrome>
  );
}

function Board({ board, panels, from, to }) {
  const range = { from: { valueOf: () => from }, to: { valueOf: () => to }, raw: { from: 'now', to: 'now' } };
  const height = Math.max(...board.map((panel) => panel.gridPos.y + panel.gridPos.h)) * ROW;
  return (
    <div style={{ position: 'relative', width: WIDTH, height }}>
      {board.map((panel) => (
        <div key={panel.id} style={{ position: 'absolute', left: (panel.gridPos.x * WIDTH) / 24, top: panel.gridPos.y * ROW }}>
          {panel.type === 'row' ? <h4>{panel.title}{panel.collapsed && ' (folded)'}</h4>
            : <Panel {...{ panel, range }} answers={panels[panel.id]} />}
        </div>
      ))}
    </div>
  );
}

const data = await (await fetch('/data.json')).json();
const board = data.boards[new URLSearchParams(location.search).get('board')];
createRoot(document.getElementById('root')).render(
  <ThemeContext.Provider value={theme}><GlobalStyles /><Board {...data} {...board} /></ThemeContext.Provider>,
);
