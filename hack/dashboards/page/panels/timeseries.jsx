// Series over time: Grafana's TimeSeries (uPlot), with its legend.
import { TimeSeries, TooltipDisplayMode } from '@grafana/ui';

export function Lines({ panel, width, height, timeRange }) {
  return (
    <TimeSeries
      frames={panel.series}
      structureRev={1}
      width={width}
      height={height}
      timeRange={timeRange}
      timeZone="utc"
      legend={panel.options.legend}
      options={{ tooltip: { mode: TooltipDisplayMode.None } }}
    />
  );
}
