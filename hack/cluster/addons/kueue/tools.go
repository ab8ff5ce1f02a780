//go:build tools

// Package tools keeps the program in go.mod: tidy would drop what nothing imports.
package tools

import _ "sigs.k8s.io/kueue/cmd/kueue"
