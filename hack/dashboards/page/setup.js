// What Grafana's own start-up does for its components before they can work: registries and their standard entries.
import {
  identityOverrideProcessor,
  standardFieldConfigEditorRegistry,
  standardTransformers,
  standardTransformersRegistry,
} from '@grafana/data';

window.grafanaBootData = { user: {}, settings: {}, navTree: [] };

// properties of a field that the dashboards set, in defaults or in overrides: Grafana's full list has editors with it, which are not published
const PROPERTIES = [
  'unit', 'min', 'max', 'decimals', 'displayName', 'noValue', 'color', 'thresholds', 'mappings', 'links', 'description', 'filterable',
];
const CUSTOM = [
  'lineWidth', 'fillOpacity', 'stacking', 'drawStyle', 'lineInterpolation', 'spanNulls', 'showPoints', 'pointSize', 'axisPlacement',
  'axisLabel', 'gradientMode', 'lineStyle', 'barAlignment', 'thresholdsStyle', 'hideFrom', 'width', 'align', 'cellOptions', 'minWidth',
];

const property = (path, isCustom) => ({
  id: isCustom ? `custom.${path}` : path,
  path,
  isCustom,
  name: path,
  process: identityOverrideProcessor,
  shouldApply: () => true,
});
standardFieldConfigEditorRegistry.setInit(() => [
  ...PROPERTIES.map((path) => property(path, false)),
  ...CUSTOM.map((path) => property(path, true)),
]);

standardTransformersRegistry.setInit(() =>
  [standardTransformers.mergeTransformer, standardTransformers.organizeFieldsTransformer].map((one) => ({
    id: one.id,
    name: one.name,
    transformation: async () => one,
  }))
);
