// Frames as plain data -> frames as Grafana's components want them: transformed, then with units, colours, limits and links applied.
import { applyFieldOverrides, cacheFieldDisplayNames, dateTime, FieldColorModeId, ThresholdsMode, toDataFrame, transformDataFrame } from '@grafana/data';
import { firstValueFrom } from 'rxjs';

// what Grafana takes for a field without thresholds and colours; each kind of panel has its own default of the latter
const THRESHOLDS = {
  mode: ThresholdsMode.Absolute,
  steps: [
    { value: -Infinity, color: 'green' },
    { value: 80, color: 'red' },
  ],
};
const COLORS = {
  timeseries: FieldColorModeId.PaletteClassic,
  'state-timeline': FieldColorModeId.ContinuousGrYlRd,
};

const opened = (thresholds) => ({
  ...thresholds,
  // JSON has no infinity: the first step begins at null
  steps: thresholds.steps.map((step) => ({ ...step, value: step.value ?? -Infinity })),
});

function config(panel) {
  const { defaults = {}, overrides = [] } = panel.fieldConfig ?? {};
  return {
    defaults: {
      ...defaults,
      thresholds: opened(defaults.thresholds ?? THRESHOLDS),
      color: defaults.color ?? { mode: COLORS[panel.type] ?? FieldColorModeId.Thresholds },
    },
    overrides,
  };
}

// what a reader would follow: the text of a link is not drawn, but that there is one is
const replaceVariables = (text) => text;

export function range(data) {
  const [from, to] = [dateTime(data.from), dateTime(data.to)];
  return { from, to, raw: { from, to } };
}

export async function prepared(data, theme) {
  return Promise.all(
    data.panels.map(async (panel) => {
      let frames = panel.frames.map((frame) => toDataFrame(frame));
      if (panel.transformations?.length && frames.length) {
        frames = await firstValueFrom(transformDataFrame(panel.transformations, frames, { interpolate: (text) => text }));
      }
      const fieldConfig = config(panel);
      const series = applyFieldOverrides({ data: frames, fieldConfig, replaceVariables, theme, timeZone: 'utc' });
      cacheFieldDisplayNames(series);
      return { ...panel, fieldConfig, series };
    })
  );
}
