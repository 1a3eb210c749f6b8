"""Speculation: the drafter protocol, draft families, trees and verification."""
