// Which series there was, and when. Grafana publishes no component for this: bars here, axis and scales by its uPlot builder.
import { applyNullInsertThreshold, getFieldDisplayName } from '@grafana/data';
import { AxisPlacement, ScaleDirection, ScaleOrientation } from '@grafana/schema';
import { measureText, UPlotChart, UPlotConfigBuilder } from '@grafana/ui';

const FONT = 12;

// [from, to, value] of each run of equal values; where a series is gone, Grafana's filler has put nulls
function runs(frame, end) {
  const filled = applyNullInsertThreshold({ frame, refFieldPseudoMax: end });
  const [{ values: times }, { values }] = filled.fields;
  const found = [];
  for (let i = 0; i < times.length; i++) {
    const last = found[found.length - 1];
    if (values[i] == null) continue;
    const until = i + 1 < times.length ? times[i + 1] : end;
    if (last && last[1] === times[i] && last[2] === values[i]) last[1] = until;
    else found.push([times[i], until, values[i]]);
  }
  return found;
}

export function States({ panel, theme, width, height, timeRange }) {
  const { options, series } = panel;
  const rows = series.map((frame) => {
    const value = frame.fields[1];
    return { field: value, name: getFieldDisplayName(value, frame, series), runs: runs(frame, timeRange.to.valueOf()) };
  });
  const builder = new UPlotConfigBuilder('utc');
  builder.addScale({
    scaleKey: 'x', isTime: true, orientation: ScaleOrientation.Horizontal, direction: ScaleDirection.Right,
    range: () => [timeRange.from.valueOf(), timeRange.to.valueOf()],
  });
  builder.addScale({
    scaleKey: 'y', orientation: ScaleOrientation.Vertical, direction: ScaleDirection.Down, range: () => [0, rows.length],
  });
  builder.addAxis({ scaleKey: 'x', isTime: true, placement: AxisPlacement.Bottom, timeZone: 'utc', theme, grid: { show: true } });
  builder.addAxis({
    scaleKey: 'y', placement: AxisPlacement.Left, theme, grid: { show: false }, ticks: { show: false }, gap: 15,
    splits: () => rows.map((_, i) => i + 0.5),
    values: () => rows.map(({ name }) => name),
    size: () => Math.max(...rows.map(({ name }) => measureText(name, FONT).width)) + 30,
  });
  builder.addSeries({ scaleKey: 'y', pathBuilder: () => null, theme, show: true, facets: undefined });
  builder.addHook('draw', (u) => {
    const { ctx } = u;
    const one = (u.bbox.height / rows.length) * options.rowHeight;
    ctx.save();
    ctx.font = `${FONT * devicePixelRatio}px ${theme.typography.fontFamily}`;
    ctx.textBaseline = 'middle';
    rows.forEach(({ field, runs }, i) => {
      const top = u.bbox.top + (u.bbox.height * (i + 0.5)) / rows.length - one / 2;
      for (const [from, to, value] of runs) {
        const [left, right] = [from, to].map((t) => Math.min(Math.max(u.valToPos(t, 'x', true), u.bbox.left), u.bbox.left + u.bbox.width));
        const { color, text } = field.display(value);
        ctx.globalAlpha = (field.config.custom?.fillOpacity ?? 70) / 100;
        ctx.fillStyle = color;
        ctx.fillRect(left, top, right - left, one);
        ctx.globalAlpha = 1;
        if (options.showValue !== 'never' && right - left > ctx.measureText(text).width + 8) {
          ctx.fillStyle = theme.colors.text.primary;
          ctx.fillText(text, left + 4, top + one / 2);
        }
      }
    });
    ctx.restore();
  });
  const times = [timeRange.from.valueOf(), timeRange.to.valueOf()];
  return <UPlotChart width={width} height={height} config={builder} data={[times, [0, rows.length]]} />;
}
