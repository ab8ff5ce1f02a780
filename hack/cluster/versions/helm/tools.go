//go:build tools

// Package tools keeps the program in go.mod: tidy would drop what nothing imports.
package tools

import _ "helm.sh/helm/v3/cmd/helm"
