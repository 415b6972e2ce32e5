// A dashboard as Grafana's own types know it, each panel with the options of its kind; a key they do not know is an error.
import type {
  AnnotationQuery,
  Dashboard,
  DataQuery,
  DataSourceRef,
  FieldConfigSource,
  Panel as AnyPanel,
  RowPanel,
} from '@grafana/schema';
import type * as bargauge from '@grafana/schema/dist/esm/raw/composable/bargauge/panelcfg/x/BarGaugePanelCfg_types.gen';
import type * as heatmap from '@grafana/schema/dist/esm/raw/composable/heatmap/panelcfg/x/HeatmapPanelCfg_types.gen';
import type * as stat from '@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen';
import type * as statetimeline from '@grafana/schema/dist/esm/raw/composable/statetimeline/panelcfg/x/StateTimelinePanelCfg_types.gen';
import type * as timeseries from '@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen';

// JSON holds the value of a string enum, not its name. Objects lose nothing else.
type Plain<T> = T extends string
  ? `${T}`
  : T extends number | boolean | null | undefined
    ? T
    : T extends Array<infer Item>
      ? Array<Plain<Item>>
      : T extends object
        ? { [Key in keyof T]: Plain<T[Key]> }
        : T;

// @grafana/schema has no types of Prometheus queries; these are what Grafana's data source reads.
interface Prometheus extends Omit<DataQuery, 'datasource'> {
  datasource?: DataSourceRef;
  expr: string;
  editorMode?: 'builder' | 'code';
  format?: 'heatmap' | 'table' | 'time_series';
  instant?: boolean;
  interval?: string;
  legendFormat?: string;
  range?: boolean;
}

type Kind<Type extends string, Options, Custom> = Omit<AnyPanel, 'fieldConfig' | 'options' | 'targets' | 'type'> & {
  type: Type;
  options: Options;
  targets: Prometheus[];
  fieldConfig: Omit<FieldConfigSource, 'defaults'> & {
    defaults: Omit<FieldConfigSource['defaults'], 'custom'> & { custom?: Custom };
  };
};

type Panel =
  | Kind<'bargauge', bargauge.Options, never>
  | Kind<'heatmap', heatmap.Options, Partial<heatmap.FieldConfig>>
  | Kind<'stat', stat.Options, never>
  | Kind<'state-timeline', statetimeline.Options, Partial<statetimeline.FieldConfig>>
  | Kind<'timeseries', timeseries.Options, Partial<timeseries.FieldConfig>>;

type Row = Omit<RowPanel, 'panels'> & { panels: Panel[] };
type Annotation = Omit<AnnotationQuery, 'target'> & { target: Prometheus; titleFormat: string };

export type Board = Plain<
  Omit<Dashboard, 'annotations' | 'panels'> & {
    annotations: { list: Annotation[] };
    panels: Array<Panel | Row>;
    uid: string;
  }
>;
