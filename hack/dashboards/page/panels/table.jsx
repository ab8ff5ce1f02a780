// A table: the component of Grafana's table panel.
import { TableNG } from '@grafana/ui/unstable';

export function Rows({ panel, width, height, timeRange }) {
  const [frame] = panel.series;
  return (
    <TableNG
      data={frame}
      width={width}
      height={height}
      fieldConfig={panel.fieldConfig}
      timeRange={timeRange}
      enableVirtualization={false}
      transparent={false}
      structureRev={1}
    />
  );
}
