// A board: what was chosen, and the panels on Grafana's grid of 24 columns. The head is this tool's own; frames of panels are Grafana's.
import { css } from '@emotion/css';
import { dateTimeFormat } from '@grafana/data';
import { Icon, PanelChrome } from '@grafana/ui';

import { range } from './data.js';
import { PANELS } from './panels/index.js';

// Grafana's: 24 columns, rows of 30 pixels, gaps of 8
const COLUMNS = 24;
const ROW = 30;
const GAP = 8;
const MARGIN = 16;
const WIDTH = 1600;

const styles = (theme) => ({
  board: css({
    width: WIDTH,
    background: theme.colors.background.canvas,
    color: theme.colors.text.primary,
    padding: MARGIN,
    fontFamily: theme.typography.fontFamily,
    fontSize: theme.typography.fontSize,
  }),
  head: css({ display: 'flex', alignItems: 'center', gap: 8, marginBottom: 12, height: 32 }),
  title: css({ ...theme.typography.h4, margin: 0, marginRight: 16 }),
  chosen: css({ display: 'flex', border: `1px solid ${theme.colors.border.medium}`, borderRadius: theme.shape.radius.default }),
  label: css({ padding: '4px 8px', background: theme.colors.background.secondary, fontWeight: 500, fontSize: 12, lineHeight: '22px' }),
  value: css({ padding: '4px 10px', background: theme.components.input.background, lineHeight: '22px' }),
  time: css({ marginLeft: 'auto', display: 'flex', gap: 6, alignItems: 'center', color: theme.colors.text.secondary }),
  row: css({ position: 'absolute', display: 'flex', alignItems: 'center', gap: 4, ...theme.typography.h6, margin: 0 }),
});

function Head({ title, variables, from, to, look }) {
  const format = (time) => dateTimeFormat(time, { timeZone: 'utc', format: 'YYYY-MM-DD HH:mm:ss' });
  return (
    <div className={look.head}>
      <h1 className={look.title}>{title}</h1>
      {variables.map(({ label, values }) => (
        <span key={label} className={look.chosen}>
          <span className={look.label}>{label}</span>
          <span className={look.value}>{values.join(' + ')}</span>
        </span>
      ))}
      <span className={look.time}>
        <Icon name="clock-nine" /> {format(from)} to {format(to)} UTC
      </span>
    </div>
  );
}

function place({ x, y, w, h }) {
  const column = (WIDTH - 2 * MARGIN + GAP) / COLUMNS;
  return { left: x * column, top: y * (ROW + GAP), width: w * column - GAP, height: h * (ROW + GAP) - GAP };
}

function Panel({ panel, theme, timeRange }) {
  const { left, top, width, height } = place(panel.gridPos);
  const Drawn = PANELS[panel.type];
  return (
    <div style={{ position: 'absolute', left, top, width, height }}>
      <PanelChrome
        title={panel.title}
        description={panel.description || undefined}
        width={width}
        height={height}
        padding={panel.type === 'table' ? 'none' : 'md'}
      >
        {(innerWidth, innerHeight) =>
          panel.series.some((frame) => frame.length) ? (
            <Drawn panel={panel} theme={theme} timeRange={timeRange} width={innerWidth} height={innerHeight} />
          ) : (
            <div style={{ display: 'grid', placeItems: 'center', height: '100%', color: theme.colors.text.secondary }}>No data</div>
          )
        }
      </PanelChrome>
    </div>
  );
}

export function Board({ panels, theme, ...data }) {
  const look = styles(theme);
  const bottom = Math.max(...panels.map(({ gridPos }) => gridPos.y + gridPos.h));
  const timeRange = range(data);
  return (
    <div className={look.board}>
      <Head {...data} look={look} />
      <div style={{ position: 'relative', height: bottom * (ROW + GAP) }}>
        {panels.map((panel, i) =>
          panel.type === 'row' ? (
            <h2 key={i} className={look.row} style={place(panel.gridPos)}>
              <Icon name="angle-down" /> {panel.title}
            </h2>
          ) : (
            <Panel key={i} panel={panel} theme={theme} timeRange={timeRange} />
          )
        )}
      </div>
    </div>
  );
}
