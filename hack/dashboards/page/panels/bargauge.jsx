// One bar a series, as it is now: Grafana's BarGauge.
import { getDisplayValueAlignmentFactors, getFieldDisplayValues } from '@grafana/data';
import { BarGauge, VizRepeater } from '@grafana/ui';

export function Bars({ panel, theme, width, height }) {
  const { options, series, fieldConfig } = panel;
  const values = getFieldDisplayValues({
    data: series, reduceOptions: options.reduceOptions, fieldConfig, replaceVariables: (text) => text, theme, timeZone: 'utc',
  });
  // a bar alone needs no name: the panel's title says what it is
  const named = (display) => (values.length > 1 ? display : { ...display, title: undefined });
  return (
    <VizRepeater
      getValues={() => values}
      getAlignmentFactors={(all) => getDisplayValueAlignmentFactors(all)}
      renderValue={({ value, alignmentFactors, width, height, orientation }) => (
        <BarGauge
          value={named(value.display)}
          width={width}
          height={height}
          orientation={orientation}
          field={value.field}
          text={options.text}
          display={value.view?.getFieldDisplayProcessor(value.colIndex)}
          theme={theme}
          itemSpacing={10}
          lcdCellWidth={12}
          displayMode={options.displayMode}
          alignmentFactors={values.length > 1 ? alignmentFactors : undefined}
          showUnfilled={options.showUnfilled}
          valueDisplayMode={options.valueMode}
          namePlacement={options.namePlacement}
        />
      )}
      source={series}
      renderCounter={0}
      itemSpacing={10}
      width={width}
      height={height}
      minVizWidth={options.minVizWidth}
      minVizHeight={options.minVizHeight}
      maxVizHeight={options.maxVizHeight ?? 300}
      orientation={options.orientation}
    />
  );
}
