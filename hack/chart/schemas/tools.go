//go:build tools

// Package schemas pins what makes the definitions of other projects' kinds that the chart has objects of.
package schemas

import (
	_ "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	_ "sigs.k8s.io/controller-tools/cmd/controller-gen"
	_ "sigs.k8s.io/kueue/apis/kueue/v1beta1"
)
