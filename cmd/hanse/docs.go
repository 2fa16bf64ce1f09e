package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// docsCommand writes the reference of all commands; a test holds docs/cli to it.
func (c *cli) docsCommand(root *cobra.Command) *cobra.Command {
	return &cobra.Command{
		Use:    "docs DIRECTORY",
		Short:  "Write the reference of all commands as Markdown",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return err
			}
			root.DisableAutoGenTag = true
			root.InitDefaultCompletionCmd()
			if err := doc.GenMarkdownTree(root, args[0]); err != nil {
				return fmt.Errorf("write the reference: %w", err)
			}
			return nil
		},
	}
}
