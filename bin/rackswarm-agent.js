#!/usr/bin/env node
import { start } from './node.js'

await start('agent')
