// Which component draws which type of panel. plan.py knows the same types: a test compares the two.
import { Bars } from './bargauge.jsx';
import { Figures } from './stat.jsx';
import { Rows } from './table.jsx';
import { Lines } from './timeseries.jsx';
import { States } from './timeline.jsx';

export const PANELS = {
  bargauge: Bars,
  stat: Figures,
  'state-timeline': States,
  table: Rows,
  timeseries: Lines,
};
